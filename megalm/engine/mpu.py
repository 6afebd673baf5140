"""The grid of ranks in the words that DeepSpeed's ZeRO asks for it, its `mpu`."""

from __future__ import annotations

import torch.distributed as dist

from megalm.parallel.groups import ParallelGroups


class ModelParallelUnit:
    """Data and tensor groups of this rank; ZeRO partitions over the one and adds gradient norms over the other."""

    def __init__(self, groups: ParallelGroups) -> None:
        assert groups.pipeline.size == 1, "a PipelineModule brings its own"
        self._data, self._tensor = groups.data, groups.tensor

    def get_data_parallel_rank(self) -> int:
        return self._data.index

    def get_data_parallel_world_size(self) -> int:
        return self._data.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data.process_group

    def get_model_parallel_rank(self) -> int:
        return self._tensor.index

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor.process_group
