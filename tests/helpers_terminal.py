"""A terminal for tests: what it shows after control codes, and a program that runs in a real pseudo-terminal."""

import errno
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.cells import cell_len

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"\033(?:\[([?\d;]*)([A-Za-z])|([78DM=>]))")


class Screen:
    """Shows what `LiveView` writes, as xterm does: a full row leaves the cursor on its last column."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.rows: list[list[str]] = [[] for _ in range(height)]  # of cells; a wide character has an empty one after it
        self.scrolled: list[list[str]] = []
        self.row = self.column = 0
        self.saved = (0, 0)
        self.is_full = False  # the last column was written, and the next character wraps

    def write(self, text: str) -> None:
        while text:
            if code := CODE.match(text):
                self._obey(code)
                text = text[code.end() :]
            else:
                self._show(text[0])
                text = text[1:]

    def _obey(self, code: re.Match) -> None:
        number, letter, short = code.groups()
        if short == "7":
            self.saved = self.row, self.column
        elif short == "8":
            self.row, self.column = self.saved
        elif short == "D":
            self._down()
        elif letter == "A":
            self.row = max(self.row - int(number), 0)
        elif letter == "J":
            del self.rows[self.row][self.column :]
            for row in self.rows[self.row + 1 :]:
                row.clear()
        else:
            assert letter == "m", code[0]
            return
        self.is_full = False

    def _down(self) -> None:
        if self.row == self.height - 1:
            self.scrolled.append(self.rows.pop(0))
            self.rows.append([])
        else:
            self.row += 1

    def _show(self, character: str) -> None:
        assert character >= " " or character == "\n", f"the control character {character!r} reached the terminal"
        width = cell_len(character)
        if not width and character != "\n":  # it joins the character before it
            self.rows[self.row][self.column - (not self.is_full)] += character
            return
        if character == "\n" or self.column + width > self.width or self.is_full:
            self._down()
            self.column, self.is_full = 0, False
        if character == "\n":
            return
        row = self.rows[self.row]
        row += " " * (self.column - len(row))
        row[self.column : self.column + width] = [character, ""][:width]
        self.column += width
        if self.column == self.width:
            self.column, self.is_full = self.width - 1, True

    @property
    def shown(self) -> list[str]:
        """Every row that was written, with what scrolled away, without empty rows at the end."""
        rows = ["".join(row).rstrip() for row in self.scrolled + self.rows]
        while rows and not rows[-1]:
            rows.pop()
        return rows


class Terminal:
    """A program that runs in a real pseudo-terminal.

    Args:
        lines: what it reads, in place of what is typed.

    Attributes:
        read: all it has written, without control codes.
    """

    def __init__(
        self, arguments: list[str], width: int = 80, height: int = 24, lines: str | None = None, **environment: str
    ):
        try:
            import pty

            self.side, other = pty.openpty()
        except (ImportError, OSError) as error:
            pytest.skip(f"this machine gives no pseudo-terminal: {error}")
        self.resize(width, height)
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        # The test answers no questions about the cursor.
        kept |= {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1", **environment}
        code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from wavedraft_command import main; sys.exit(main())"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(ROOT), *arguments],
            stdin=other if lines is None else subprocess.PIPE,
            stdout=other,
            stderr=subprocess.PIPE,
            env=kept,
            preexec_fn=own_terminal,
        )
        os.close(other)
        if lines is not None:
            self.process.stdin.write(lines.encode())
            self.process.stdin.close()
            self.process.stdin = None
        self.raw, self.num_seen = "", 0

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self.side)

    def resize(self, width: int, height: int) -> None:
        import fcntl
        import struct
        import termios

        fcntl.ioctl(self.side, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self.side, keys.encode())

    @property
    def read(self) -> str:
        return CODE.sub("", self.raw).replace("\r", "")

    def wait_for(self, text: str, seconds: float = 90) -> str:
        """Reads until `text` comes after what was waited for before. Returns what came, up to its end."""
        end = time.monotonic() + seconds
        while (place := self.read.find(text, self.num_seen)) < 0:
            assert time.monotonic() < end, f"{text!r} did not come; the terminal has:\n{self.read}"
            assert self._pump(), (
                f"the program ended before {text!r} came:\n{self.read}\n{self.process.stderr.read().decode()}"
            )
        came = self.read[self.num_seen : place + len(text)]
        self.num_seen = place + len(text)
        return came

    def wait(self, seconds: float = 30) -> int:
        """Reads to the end of the program; its exit code."""
        end = time.monotonic() + seconds
        while self._pump():
            assert time.monotonic() < end, f"the program does not end:\n{self.read}"
        return self.process.wait(timeout=seconds)

    def _pump(self) -> bool:
        """Reads what is there; False at the program's end."""
        if not select.select([self.side], [], [], 0.2)[0]:
            return True
        try:
            read = os.read(self.side, 65536)
        except OSError as error:  # Linux tells the end so
            if error.errno != errno.EIO:
                raise
            return False
        self.raw += read.decode(errors="replace")
        return bool(read)


def own_terminal() -> None:
    """In the child: the pseudo-terminal becomes its own, so that Ctrl-C reaches it alone."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(1, termios.TIOCSCTTY, 0)
