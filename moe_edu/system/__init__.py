"""The machine, its browser and its JupyterLab; which packages are installed and which are missing."""
