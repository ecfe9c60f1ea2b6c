"""`python -m wavedraft`, and `accelerate launch -m wavedraft train ...` for several processes."""

from .cli import main

main()
