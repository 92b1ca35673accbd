"""``python -m domlora``, which is also what torchrun starts: ``torchrun --nproc-per-node 2 -m domlora pretrain ...``."""

import os

__all__: list[str] = []

if __name__ == "__main__":
    # DistributedDataParallel warns where no parameter was unused in a first batch; in a later one it may be
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from domlora.cli import main

    main()
