#!/bin/bash
# Full fine-tuning on two machines of eight GPUs: sbatch finetune/clusters/slurm.sh
# Submit it in the folder of the repository, which all machines have to see.
#SBATCH --job-name=lit_gpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# Five minutes before the time limit this script, and not its tasks, gets SIGUSR1
#SBATCH --signal=B:USR1@300

out_dir=out/full/slurm
source .venv/bin/activate

# the first machine of the job, and a port that other jobs on it do not take
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
# how long torchrun waits for the save after SIGTERM; without it 30 seconds
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
# export NCCL_SOCKET_IFNAME=ib0    # where NCCL takes the wrong network

# one torchrun on each machine; $SLURM_NODEID is another number in each task. --resume begins a run where there is none
srun --kill-on-bad-exit=1 bash -c '
    exec torchrun --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" --nproc_per_node 8 \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --max_restarts 3 \
        finetune/full.py --out_dir '"$out_dir"' --resume
' &
step=$!

# the time is nearly over: torchrun passes SIGTERM on, the step at hand is finished and saved, and the job queues again
time_is_over() {
    echo "The time is over: saving, and queueing again."
    scancel --signal=TERM "$SLURM_JOB_ID.0"
    wait "$step"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap time_is_over USR1

wait "$step"
