"""The folder runs/<job>/: what a job leaves behind. Files appear whole, under their name, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

MODEL = "model.safetensors"
PART = f"{MODEL}.part"


class RunFolder:
    """All runs of one coordinator, under `root`. Methods raise OSError."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def is_taken(self, job_id: str) -> bool:
        return (self.root / job_id).exists()

    def open(self, job_id: str, specification: str) -> None:
        """Make the job's folder with its resolved specification, or none. Raises FileExistsError when it is there."""
        folder = self.root / job_id
        folder.mkdir()
        text = yaml.safe_dump(json.loads(specification), sort_keys=False, allow_unicode=True)
        try:
            _write_whole(folder / "job.yaml", text)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)  # it would take the name from the next try
            raise

    def append_metrics(self, job_id: str, figures: Mapping[str, Any]) -> None:
        with (self.root / job_id / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures, allow_nan=False) + "\n")

    def write_result(self, job_id: str, result: Mapping[str, Any]) -> None:
        _write_whole(self.root / job_id / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")

    def store_part(self, job_id: str, offset: int, data: memoryview) -> None:
        """Put bytes at `offset`; 0 begins the file anew."""
        with (self.root / job_id / PART).open("r+b" if offset else "wb") as file:
            file.seek(offset)
            file.write(data)

    def seal_model(self, job_id: str) -> None:
        """Make the exported bytes durable, then visible as model.safetensors."""
        part = self.root / job_id / PART
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(self.root / job_id / MODEL)
        _sync_folder(part.parent)

    def model(self, job_id: str) -> Path:
        return self.root / job_id / MODEL


def _write_whole(path: Path, text: str) -> None:
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
