"""From emissions to words: decoders behind one protocol."""
