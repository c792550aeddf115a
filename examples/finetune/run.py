"""The whole example: prepare the data, train the runs, measure them, print the table."""

from ..common.classification import compare
from . import prepare
from .recipe import EXPERIMENT

if __name__ == "__main__":
    compare(EXPERIMENT, prepare.main)
