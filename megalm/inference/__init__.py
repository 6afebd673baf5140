"""A checkpoint as a plain model: evaluated, asked for text; no engine, no process group."""
