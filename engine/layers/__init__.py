"""The layers models are made of. Each owns how its weights are loaded and split over tensor-parallel ranks."""
