"""What the methods run on, one subject a file. Nothing here imports a method or the top level.

The scripts import this before PyTorch, since it says how long PyTorch's threads spin while they wait for each other,
before they sleep. OpenMP's default, some milliseconds, costs nothing on an idle machine. On a busy one the threads take
from each other the time that they wait for: beside one busy process per core, training fell to 0.22 of its rate. With
less spinning it keeps 0.40, and loses nothing on an idle machine. It is read when PyTorch is imported."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
