"""The paper's experiments. They call the scripts' `main`; there is no second copy of training."""
