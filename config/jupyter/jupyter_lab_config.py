"""JupyterLab for this project: opens on the tour, asks nothing, calls nobody.

``make lab`` points ``JUPYTER_CONFIG_PATH`` here; your own configuration stays as it is.
"""

import os

c = get_config()  # noqa: F821

c.LabApp.default_url = "/lab/tree/notebooks/00_tour.ipynb"
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
c.LabApp.extension_manager = "readonly"

# Kernels inherit this: PyTorch's profiler warns of memory older than itself.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
