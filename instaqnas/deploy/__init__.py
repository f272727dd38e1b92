"""Inference with a trained detector and its policy: `load`, and the result for an image, `Prediction`."""

from instaqnas.deploy.predictor import Prediction, Predictor, load

__all__ = ["Prediction", "Predictor", "load"]
