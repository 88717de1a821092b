"""JupyterLab whose kernels' answers reach the page at once; run as a file: `python moe_edu/system/prompt_lab.py`.

A kernel answers a moved widget with several small messages. With Jupyter's own sockets, each message waits until the
page has acknowledged the one before, which Linux does after 40 ms; here none waits.
"""

from __future__ import annotations

import sys
from typing import Any

from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
from jupyterlab.labapp import main


class PromptConnection(ZMQChannelsWebsocketConnection):
    """Connects a page and a kernel, and sends each message without delay."""

    def connect(self) -> Any:
        self.websocket_handler.set_nodelay(True)
        return super().connect()


if __name__ == "__main__":
    setting = f"--ServerApp.kernel_websocket_connection_class={__name__}.{PromptConnection.__name__}"
    sys.exit(main([setting, *sys.argv[1:]]))
