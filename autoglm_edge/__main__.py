"""`python -m autoglm_edge` is the command `autoglm`."""

from autoglm_edge.cli import main

if __name__ == "__main__":
    main()
