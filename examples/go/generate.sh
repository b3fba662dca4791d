#!/bin/sh
# Makes the code of the contract in dreamnet/, as `go generate` calls it. Needs a python3 with grpcio-tools, for its
# protoc; protoc's plugins are built here, in the versions that go.mod names. PROTO says where the contract is, if this folder
# is not where it was.
set -eu
module=dreamnet.example/alarm
options= protos=
GOBIN="$PWD/bin" go install tool
for proto in dreamnet/subsystem/v1/subsystem.proto dreamnet/orchestrator/v1/orchestrator.proto; do
    # The contract names no Go package: M says where each file's code belongs.
    options="$options --go_opt=M$proto=$module/${proto%/*} --go-grpc_opt=M$proto=$module/${proto%/*}"
    protos="$protos $proto"
done
python3 -m grpc_tools.protoc -I "${PROTO:-../../proto}" \
    --plugin=bin/protoc-gen-go --go_out=. --go_opt=module=$module \
    --plugin=bin/protoc-gen-go-grpc --go-grpc_out=. --go-grpc_opt=module=$module \
    $options $protos
