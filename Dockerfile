# Two images of one recipe: `gateway` has no torch and some 100 MB of packages, `runtime` has the engine.
#   docker build --target gateway -t headgate-gateway .
#   docker build --target runtime -t headgate-runtime .
# What each installs stands in EXTRAS below; pyproject.toml says what these are, constraints.txt which versions.
ARG PYTHON=python:3.11.13-slim-bookworm

FROM ${PYTHON} AS base
ENV PATH=/opt/headgate/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# Volumes take owner and mode from here when they are first mounted. Sockets in /run/headgate are for its group, too (setgid).
RUN groupadd --gid 10001 headgate \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/headgate --shell /usr/sbin/nologin headgate \
 && install -d -o 10001 -g 10001 /var/lib/headgate /var/lib/headgate/ledger /var/cache/headgate \
 && install -d -o 10001 -g 10001 -m 2770 /run/headgate
WORKDIR /var/lib/headgate

FROM base AS source
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /opt/headgate
COPY pyproject.toml constraints.txt ./
COPY deploy/requirements.py deploy/

# Packages and our own files are layers of their own: a new version of ours is some 20 MB to fetch.
FROM source AS gateway-packages
ARG EXTRAS="gateway"
RUN python deploy/requirements.py ${EXTRAS} > requirements.txt \
 && pip install -c constraints.txt -r requirements.txt \
 && pip uninstall --yes setuptools pip

# torch as pip finds it has CUDA on x86-64. TORCH_INDEX: an index with the build that you want instead.
FROM source AS runtime-packages
ARG EXTRAS="runtime"
ARG TORCH_INDEX=""
RUN if [ -n "${TORCH_INDEX}" ]; then pip install -c constraints.txt --index-url "${TORCH_INDEX}" torch; fi \
 && python deploy/requirements.py ${EXTRAS} > requirements.txt \
 && pip install -c constraints.txt -r requirements.txt \
 && pip uninstall --yes pip

FROM source AS ours
COPY . .
RUN pip install --no-deps --root /ours .

FROM base AS gateway
COPY --from=gateway-packages /opt/headgate /opt/headgate
COPY --from=ours /ours/opt/headgate /opt/headgate
USER 10001:10001
EXPOSE 8080
CMD ["python", "-P", "-m", "gateway", "--help"]

FROM base AS runtime
# COMPILER=g++, 400 MB, is what `runtime.compile: auto` needs. Its version is Debian's: what it makes is tested when it is loaded.
ARG COMPILER=""
# hadolint ignore=DL3008
RUN if [ -n "${COMPILER}" ]; then \
      apt-get update && apt-get install -y --no-install-recommends "${COMPILER}" && rm -rf /var/lib/apt/lists/*; fi
COPY --from=runtime-packages /opt/headgate /opt/headgate
COPY --from=ours /ours/opt/headgate /opt/headgate
# Threads that spin while they wait for one without a core made 100 tokens a second 5.
ENV OMP_WAIT_POLICY=passive \
    XDG_CACHE_HOME=/var/cache/headgate
USER 10001:10001
EXPOSE 8000
CMD ["python", "-P", "-m", "runtime", "--help"]
