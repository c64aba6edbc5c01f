"""Predictive distributions of models with dropout: Monte-Carlo dropout."""
