"""Run a command whose output nobody reads any more: `lose_reader.py ARGUMENT ...`."""

import os
import sys

from celltron.cli.main import main

reader, writer = os.pipe()
os.close(reader)
for stream in (sys.stdout, sys.stderr):
    os.dup2(writer, stream.fileno())
sys.exit(main())
