"""The layers of models. Each owns how its weights are loaded and split over tensor-parallel ranks."""
