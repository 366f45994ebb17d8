"""`python -m kilobench …` is the command `kilobench …`; torchrun starts its ranks through it. Written by hand: nbdev cannot export it."""
from kilobench.core.cli import main

if __name__ == "__main__": main()
