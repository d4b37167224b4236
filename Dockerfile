# The service in a container.
#
#   docker build -t retouch .                                                      for the CPU
#   docker build -t retouch --build-arg FEATURES=cuda --build-arg CUDA_COMPUTE_CAP=89 \
#       --build-arg BUILDER=nvidia/cuda:13.0.1-devel-ubuntu24.04 \
#       --build-arg RUNTIME=nvidia/cuda:13.0.1-runtime-ubuntu24.04 .                for NVIDIA GPUs (here an RTX 4090's kind)
#
#   docker run -p 127.0.0.1:8090:8090 -v retouch:/state -e RETOUCH_API_KEY=... retouch
#
# With a GPU add `--gpus all`; for models from the hub `-v ~/.cache/huggingface:/cache`.
ARG BUILDER=debian:bookworm
ARG RUNTIME=debian:bookworm-slim

FROM ${BUILDER} AS build
ARG FEATURES=
ARG CUDA_COMPUTE_CAP=
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential ca-certificates curl \
    && rm -rf /var/lib/apt/lists/*
RUN curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal
ENV PATH=/root/.cargo/bin:$PATH
WORKDIR /source
COPY . .
# Without a value the build asks the GPU of the machine, and there is none while an image is built.
RUN if [ -n "$CUDA_COMPUTE_CAP" ]; then export CUDA_COMPUTE_CAP; else unset CUDA_COMPUTE_CAP; fi; \
    cargo build --release --locked --bin retouch --features "$FEATURES"

FROM ${RUNTIME}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates curl \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /nonexistent retouch \
    && install -d -o retouch -g retouch -m 700 /state /cache
COPY --from=build /source/target/release/retouch /usr/local/bin/retouch
USER retouch
ENV HF_HOME=/cache
VOLUME ["/state", "/cache"]
EXPOSE 8090
HEALTHCHECK --start-period=60s CMD ["curl", "--fail", "--silent", "http://127.0.0.1:8090/ready"]
# Inside, every address is the container's own; who gets in is decided by the port that is published and by the key, without
# which this does not start.
ENTRYPOINT ["retouch", "serve", "--host", "0.0.0.0", "--state", "/state"]
