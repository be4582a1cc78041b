"""`python -m keras_memory` is the command `keras-memory`."""

import sys

from keras_memory.cli import main

if __name__ == "__main__":
    sys.exit(main())
