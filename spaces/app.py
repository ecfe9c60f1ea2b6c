"""A Hugging Face Space that is the page of `wavedraft web`. Its variables name the model."""

import os

from wavedraft.web.page import LOOK, web_page
from wavedraft.web.racer import Racer

MODEL = os.environ.get("WAVEDRAFT_MODEL", "ORG/NAME")  # a TiDAR or recurrent-depth checkpoint
ADAPTER = os.environ.get("WAVEDRAFT_ADAPTER") or None
DTYPE = os.environ.get("WAVEDRAFT_DTYPE", "auto")

racer = Racer.load(model=MODEL, adapter=ADAPTER, dtype=DTYPE, device=None, packed_weights=None, compile=False)
page = web_page(racer)
if __name__ == "__main__":
    page.launch(**LOOK)
