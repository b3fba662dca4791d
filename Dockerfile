# The service alone: its binary, the libraries that it is linked to, and the certificates of public authorities.
#
#   docker build --tag orchestrator --build-arg BUILD_COMMIT="$(git rev-parse --short=12 HEAD)" .
#   docker run --network host --volume orchestrator:/var/lib/orchestrator orchestrator
#
# With podman or buildah, add `--format docker`: images of the OCI's format have no health check.

# The version of Rust is the rust-version of Cargo.toml.
FROM rust:1.95.0-slim-bookworm AS build
# Takes precedence over rust-toolchain.toml, by which rustup would download the newest version.
ENV RUSTUP_TOOLCHAIN=1.95.0
WORKDIR /build
COPY . .
# What `orchestrator --version` shows: the context of the build has no history.
ARG BUILD_COMMIT=
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/build/target \
    cargo build --release --locked --bin orchestrator \
    && install -D --strip target/release/orchestrator /image/usr/bin/orchestrator \
    && ldd /image/usr/bin/orchestrator | grep --only-matching '/[^ ]*' \
       | xargs --replace install -D --mode 755 {} /image{} \
    && install -D --mode 644 /etc/ssl/certs/ca-certificates.crt /image/etc/ssl/certs/ca-certificates.crt \
    && mkdir -p /store

FROM scratch
COPY --from=build /image /
# A new volume is owned by the user of the service.
COPY --from=build --chown=65532:65532 /store /var/lib/orchestrator
USER 65532:65532
WORKDIR /var/lib/orchestrator
VOLUME /var/lib/orchestrator
# The gRPC server, and the dashboard with the metrics.
EXPOSE 7700 7780
# With another server.listen, set ORCHESTRATOR_ADDRESS to an address of it, or to its socket (unix:PATH).
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["/usr/bin/orchestrator", "health", "--timeout", "4s"]
ENTRYPOINT ["/usr/bin/orchestrator"]
CMD ["serve"]
