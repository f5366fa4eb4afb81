"""Rerank, score and classify: what models with a classification head answer."""
