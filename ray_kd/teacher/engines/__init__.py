"""One file per engine: `teacher.engine: {kind: x}` loads x.py, its Config and its Engine (see ../engine.py)."""
