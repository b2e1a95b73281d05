"""The paper's experiments, thin over the scripts: they call the scripts' `main`, never a second copy of training."""
