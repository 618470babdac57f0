"""Split fine-tuning as a Flower app: Flower starts, authenticates and stops the parties, our own stream carries each step.

| module | holds |
|---|---|
| `model_party_app` | the ServerApp: loads the model party's half, serves it for one run, and leads the rounds |
| `data_party_app` | the ClientApp: loads the data party's half, and trains it on its node's records |
| `options` | what a run says (run config), and what a node says (node config) |
| `handover` | how a node is told where the model party is, with a token of its own |
| `party_grid` | Flower's grid with the nodes of one run: hands over, takes note, and lets go of who is lost |
| `served_half` | the model party's half behind TLS, for the length of a run |
| `node_records` | a node's records as batches |

A pyproject.toml names both apps: ``serverapp = "vflair_flower.model_party_app:app"`` and ``clientapp =
"vflair_flower.data_party_app:app"``.
"""
