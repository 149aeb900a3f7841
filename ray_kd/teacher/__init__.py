"""The teacher: engines answer rows with payloads, the stage puts an engine into the stream."""
