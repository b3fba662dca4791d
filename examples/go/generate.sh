#!/bin/sh
# Generates the code of the contract in dreamnet/; called by `go generate`. Needs a python3 with grpcio-tools, for its protoc; protoc's plugins are built here, in the versions of go.mod. In a copy of this folder, set PROTO to the location of the contract.
set -eu
module=dreamnet.example/alarm
options= protos=
GOBIN="$PWD/bin" go install tool
for proto in dreamnet/subsystem/v1/subsystem.proto dreamnet/orchestrator/v1/orchestrator.proto; do
    # The contract names no Go package: M sets the package of each file.
    options="$options --go_opt=M$proto=$module/${proto%/*} --go-grpc_opt=M$proto=$module/${proto%/*}"
    protos="$protos $proto"
done
python3 -m grpc_tools.protoc -I "${PROTO:-../../proto}" \
    --plugin=bin/protoc-gen-go --go_out=. --go_opt=module=$module \
    --plugin=bin/protoc-gen-go-grpc --go-grpc_out=. --go-grpc_opt=module=$module \
    $options $protos
