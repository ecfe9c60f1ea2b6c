"""`wavedraft web`: a page in the browser on which parallel and plain decoding race."""

import socket
import threading
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from .early_checks import check_decoding, load_library, say
from .options import Adapter, Compile, Device, Dtype, Model, PackedWeights

Host = Annotated[
    str,
    typer.Option(help="Serve the page at this address. 0.0.0.0 also serves other machines; there is no password."),
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Serve the page at this port; 0 takes any free one.")]


def web(
    model: Model,
    adapter: Adapter = None,
    packed_weights: PackedWeights = None,
    compile: Compile = False,
    dtype: Dtype = "auto",
    device: Device = None,
    host: Host = "127.0.0.1",
    port: Port = 7860,
) -> None:
    """Open a page on which parallel and plain decoding race on the same prompt.

    Drafts are shown, and a trace of what each forward wrote. It needs Gradio, which the extra "web" installs.
    """
    fixed: dict[str, Any] = {name: value for name, value in locals().items() if name not in ("host", "port")}
    check_decoding(fixed)
    port = free_port(host, port)
    if find_spec("gradio") is None:
        raise ValueError("`wavedraft web` needs Gradio, which is not installed. Run: pip install 'gradio>=6'")
    load_library()
    from ..web.page import LOOK, web_page
    from ..web.racer import Racer

    racer = Racer.load(**fixed)
    page = web_page(racer)
    page.launch(server_name=host, server_port=port, quiet=True, prevent_thread_lock=True, **LOOK)
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    print(f"The page is at http://{shown}:{port}/ until Ctrl-C.", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        racer.stop_all()
        page.close(verbose=False)
    say(f"Next: wavedraft bench {model} times every way to decode beside each other.")


def free_port(host: str, port: int) -> int:
    """The port asked for, or any free one in place of 0.

    Raises:
        ValueError: the port is taken, or the address is not this machine's.
    """
    try:
        with socket.socket() as opened:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind((host, port))
            return opened.getsockname()[1]
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port} cannot be served: {error.strerror or error}. Give another --port, or 0 for "
            "any free one."
        ) from None
