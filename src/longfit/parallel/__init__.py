"""Floor 4: many devices, through torch.distributed; torchrun's agent starts processes, DDP and FSDP2 wrap the model.

launch.py       start the processes of a run on this machine, and tell in one message why one of them ended
heartbeat.py    end a run whose processes do not move any more
agreement.py    compare what the processes see before they begin
processes.py    the process group: time-outs, the store of the heartbeat, the last word
layout.py       which device trains which windows, which tokens of a window, which rows of the weights
halo.py         which keys and values travel between the processes of a sequence, and how
sequence.py     one window over several processes: its cut, and the loss of a part
shard.py        weights shared between devices (FSDP2), and their trained part as an optimiser and a file want it
traffic.py      bytes sent in a step, as formulas
"""
