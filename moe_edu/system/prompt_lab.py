"""JupyterLab whose kernels' answers reach the page at once: `python moe_edu/system/prompt_lab.py`, as a file.

A kernel answers a moved widget with several small messages. As Jupyter opens its sockets, each waits until the page
has acknowledged the one before, which Linux does after 40 ms; here none waits.
"""

from __future__ import annotations

import sys
from typing import Any

from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
from jupyterlab.labapp import main


class PromptConnection(ZMQChannelsWebsocketConnection):
    """Between a page and a kernel; sends each message when it comes."""

    def connect(self) -> Any:
        self.websocket_handler.set_nodelay(True)
        return super().connect()


if __name__ == "__main__":
    setting = f"--ServerApp.kernel_websocket_connection_class={__name__}.{PromptConnection.__name__}"
    sys.exit(main([setting, *sys.argv[1:]]))
