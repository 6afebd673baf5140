"""What a run amounts to before it is started, drawn too, and what a document says of it, judged. No torch."""
