# `make demo` in a container, on CPUs:
#   docker build -t optimum-clp . && docker run --rm optimum-clp
# Without a GPU, name PyTorch's CPU index (pytorch.org/get-started), or the image has several GB of CUDA packages:
#   docker build -t optimum-clp --build-arg TORCH="torch==2.13.0 --index-url ADDRESS_OF_THE_CPU_INDEX" .
FROM python:3.11-slim

RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home user && install -d -o user -g user /home/user/optimum-clp
USER user
WORKDIR /home/user/optimum-clp

# what is installed changes less often than what is run
ARG TORCH="torch==2.13.0"
COPY --chown=user:user Makefile setup.cfg pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=user:user optimum_clp optimum_clp
RUN make install TORCH="$TORCH"

COPY --chown=user:user benchmarks benchmarks
ENV HF_HUB_OFFLINE=1
CMD ["make", "demo"]
