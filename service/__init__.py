"""Everything that turns audio into text, without torch."""
