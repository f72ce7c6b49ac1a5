"""Everything that turns recordings and text into a trained model."""
