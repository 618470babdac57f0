"""Writes down every frame that the cells of a process receive, decrypted by TLS: for the server's processes, in tests."""

import os

if folder := os.environ.get("VFLAIR_RECORD"):
    from nvflare.fuel.f3.sfm.conn_manager import ConnManager

    taken = ConnManager.process_frame_task

    def recorded(self, connection, frame):
        with open(os.path.join(folder, str(os.getpid())), "ab") as file:  # noqa: PTH118, PTH123
            file.write(bytes(frame))
        return taken(self, connection, frame)

    ConnManager.process_frame_task = recorded
