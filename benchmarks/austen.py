"""Jane Austen's six novels as plain text, from the Debian package that carries them (public domain).

    apt-get download r-cran-janeaustenr
    python benchmarks/austen.py r-cran-janeaustenr_*.deb austen.txt

One paragraph a line, an empty line between chapters. Needs `dpkg-deb`.
"""

import argparse
import re
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

DATABASE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
CHAPTER = re.compile(r"(CHAPTER|Chapter|VOLUME) [IVXL\d]+\.?")


def strings_of(serialized: bytes) -> list[str]:
    """The strings of one R character vector, in R's XDR serialization, format 2 or 3."""
    assert serialized[:2] == b"X\n", "not XDR"
    version = struct.unpack(">i", serialized[2:6])[0]
    place = 14
    if version == 3:  # the native encoding's name
        place += 4 + struct.unpack(">i", serialized[place : place + 4])[0]
    flags, count = struct.unpack(">ii", serialized[place : place + 8])
    assert flags & 255 == 16, "not a character vector"
    place, strings = place + 8, []
    for _ in range(count):
        length = struct.unpack(">i", serialized[place + 4 : place + 8])[0]
        strings.append(serialized[place + 8 : place + 8 + length].decode("utf-8"))
        place += 8 + length
    return strings


def novels(package: str) -> list[list[str]]:
    """Each novel's printed lines."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        database = (Path(folder) / DATABASE).read_bytes()
    place, found = 0, []
    while place < len(database):  # each record: the inflated length, then a zlib stream
        inflater = zlib.decompressobj()
        found.append(strings_of(inflater.decompress(database[place + 4 :])))
        place = len(database) - len(inflater.unused_data)
    return found


def chapters(lines: list[str]) -> list[str]:
    """A novel's chapters, each of one paragraph a line, without what stands before the first."""
    found: list[str] = []
    for paragraph in "\n".join(lines).split("\n\n"):
        words = " ".join(paragraph.replace("_", "").split())
        if CHAPTER.fullmatch(words):
            found.append("")
        elif found and words:
            found[-1] += words + "\n"
    return [chapter for chapter in found if chapter]


def main() -> None:
    """Write the text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", help="the .deb file")
    parser.add_argument("output", help="the text file to write")
    arguments = parser.parse_args()
    texts = [chapter for lines in novels(arguments.package) for chapter in chapters(lines)]
    Path(arguments.output).write_text("\n".join(texts), encoding="utf-8")
    print(f"{arguments.output}: {len(texts)} chapters, {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    main()
