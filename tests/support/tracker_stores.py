"""What TensorBoard, MLflow and trackio hold of some runs, read by their own readers."""

from __future__ import annotations

import collections

from attrs import define, field


@define
class Told:
    """What a store holds of one run: its settings, (step, value) by name of figure, and how it ended."""

    settings: dict[str, str]
    ended: str
    figures: dict[str, list[tuple[int, float]]] = field(
        factory=lambda: collections.defaultdict(list)
    )


def tensorboard(folder) -> list[Told]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = []
    for run in sorted((folder / "runs").iterdir()):
        told = Told({}, "")
        for place in [run, *(path for path in run.rglob("*") if path.is_dir())]:
            events = EventAccumulator(str(place), size_guidance={"scalars": 0}).Reload()
            series = "result" if place == run else place.relative_to(run).as_posix()
            for tag in events.Tags()["scalars"]:
                each = events.Scalars(tag)
                told.figures[f"{series}/{tag}"] = [(point.step, point.value) for point in each]
            if place == run:
                texts = {
                    name: events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0]
                    for name in ("settings", "status")
                }
                lines = texts["settings"].decode().splitlines()[2:]
                told.settings = dict(line[2:-2].split(" | ", 1) for line in lines)
                told.ended = texts["status"].decode()
        found.append(told)
    return sorted(found, key=lambda told: told.ended, reverse=True)  # finished, failed


def mlflow(folder) -> list[Told]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    number = client.get_experiment_by_name("vflair").experiment_id
    found = []
    for run in client.search_runs([number], order_by=["attributes.start_time"]):
        ended = f"{run.info.status} {run.data.tags.get('error', '')}".strip()
        told = Told(
            run.data.params, ended.replace("FINISHED", "finished").replace("FAILED", "failed")
        )
        for name in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, name)
            told.figures[name] = [(metric.step, metric.value) for metric in history]
        found.append(told)
    return found


def trackio(folder) -> list[Told]:
    from trackio.sqlite_storage import SQLiteStorage

    found = []
    for record in SQLiteStorage.get_run_records("vflair"):
        config = SQLiteStorage.get_run_config("vflair", run_id=record["id"])
        settings = {path: str(value) for path, value in config.items() if path[0] != "_"}
        told = Told(settings, "")
        for row in SQLiteStorage.get_logs("vflair", run_id=record["id"]):
            step = row.pop("step")
            told.ended = row.pop("status", told.ended)
            del row["timestamp"]
            for name, value in row.items():
                told.figures[name].append((step, value))
        found.append(told)
    return found


READERS = {"tensorboard": tensorboard, "mlflow": mlflow, "trackio": trackio}
