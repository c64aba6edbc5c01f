"""Predictive distributions of Monte-Carlo dropout."""
