"""What you can ask of a trained model: its features, their atlas, labels and attributions."""
