# The Voxgate server. CPU:  docker build -t voxgate .
#                     GPU:  docker build -t voxgate:gpu --build-arg RUNTIME=gpu .

FROM python:3.11-slim-bookworm AS build
ARG RUNTIME=cpu
# kenlm is compiled here; the compiler stays in this stage
RUN apt-get update \
 && apt-get install --yes --no-install-recommends cmake g++ make \
 && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/voxgate
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY service service
COPY training training
COPY export export
RUN /opt/voxgate/bin/pip install --no-cache-dir .
# both onnxruntime packages write the same folder: the GPU image has the other one alone
RUN if [ "$RUNTIME" = gpu ]; then \
      /opt/voxgate/bin/pip uninstall --yes onnxruntime onnxruntime-gpu \
      && /opt/voxgate/bin/pip install --no-cache-dir "onnxruntime-gpu[cuda,cudnn]"; \
    fi

FROM python:3.11-slim-bookworm
# the search is compiled for the processor at the first start, and kept
RUN useradd --system --uid 10001 --no-create-home voxgate \
    && install -d -o voxgate /var/cache/voxgate
COPY --from=build /opt/voxgate /opt/voxgate
ENV PATH=/opt/voxgate/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    VOXGATE_BUNDLE=/bundles/en-small \
    VOXGATE_CACHE=/var/cache/voxgate
USER voxgate
EXPOSE 50051
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["voxgate", "health"]
ENTRYPOINT ["voxgate"]
CMD ["serve", "--host", "0.0.0.0"]
