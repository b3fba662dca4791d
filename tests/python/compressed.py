"""A subsystem with compressed answers, registered by a compressed request: `compressed.py PROTO_DIR ADDRESS`."""

import sys
from concurrent import futures

import grpc

proto_dir, address = sys.argv[1:]
sys.path.insert(0, proto_dir)
pb, rpc = grpc.protos_and_services("dreamnet/subsystem/v1/subsystem.proto")
core, core_rpc = grpc.protos_and_services("dreamnet/orchestrator/v1/orchestrator.proto")


class Compressed(rpc.SubsystemServicer):
    def Initialize(self, request, context):
        return pb.InitializeResponse()

    def RunCycle(self, request, context):
        response = pb.RunCycleResponse()
        response.output.update({"text": "x" * 100_000})
        return response


server = grpc.server(futures.ThreadPoolExecutor(4), compression=grpc.Compression.Gzip)
rpc.add_SubsystemServicer_to_server(Compressed(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
with grpc.insecure_channel(address, compression=grpc.Compression.Gzip) as channel:
    registration = core.Registration(name="python", endpoint=f"http://127.0.0.1:{port}")
    registration.parameters.update({"text": "x" * 10_000})
    request = core.RegisterSubsystemRequest(registration=registration)
    core_rpc.OrchestratorStub(channel).RegisterSubsystem(request)
print(f"listening on 127.0.0.1:{port}", flush=True)
server.wait_for_termination()
