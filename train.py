"""Train a model from a config: python train.py --config CONFIG --data_dir DATA --output_dir OUT (see --help)."""

import sys

from trellis.trainers.launch import main

if __name__ == "__main__":
    sys.exit(main())
