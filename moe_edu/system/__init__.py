"""The machine, its browser and its JupyterLab; what is installed and what is missing."""
