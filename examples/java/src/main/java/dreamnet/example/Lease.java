package dreamnet.example;

import com.google.protobuf.Duration;
import dreamnet.orchestrator.v1.OrchestratorGrpc;
import dreamnet.orchestrator.v1.OrchestratorGrpc.OrchestratorBlockingStub;
import dreamnet.orchestrator.v1.OrchestratorOuterClass.RegisterSubsystemRequest;
import dreamnet.orchestrator.v1.OrchestratorOuterClass.Registration;
import dreamnet.orchestrator.v1.OrchestratorOuterClass.RenewLeaseRequest;
import dreamnet.orchestrator.v1.OrchestratorOuterClass.UnregisterSubsystemRequest;
import io.grpc.ChannelCredentials;
import io.grpc.Grpc;
import io.grpc.ManagedChannel;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import java.util.concurrent.Executors;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;

/** Registers a subsystem with a lease and renews it. Retries without a limit. */
final class Lease implements AutoCloseable {
    /** Time until the orchestrator unregisters a dead subsystem. */
    private static final int SECONDS = 15;

    private final Registration registration;
    private final String orchestrator;
    private final ManagedChannel channel;
    private final ScheduledExecutorService timer = Executors.newSingleThreadScheduledExecutor();
    private boolean registered;

    Lease(Registration registration, String orchestrator, ChannelCredentials credentials) {
        this.registration = registration;
        this.orchestrator = orchestrator;
        channel = Grpc.newChannelBuilder(orchestrator, credentials).build();
        timer.execute(this::renew);
    }

    private void renew() {
        long pause = SECONDS * 1000 / 3;
        try {
            if (registered) {
                stub().renewLease(RenewLeaseRequest.newBuilder().setName(registration.getName()).build());
            } else {
                stub().registerSubsystem(RegisterSubsystemRequest.newBuilder()
                        .setRegistration(registration)
                        .setLease(Duration.newBuilder().setSeconds(SECONDS))
                        .build());
                registered = true;
            }
        } catch (StatusRuntimeException error) {
            System.err.println(orchestrator + ": " + error.getMessage());
            Status.Code code = error.getStatus().getCode();
            // The lease has expired, or it was registered without one.
            if (code == Status.Code.NOT_FOUND || code == Status.Code.FAILED_PRECONDITION) {
                registered = false;
            }
            channel.enterIdle(); // The next call connects at once, and uses the certificate as it is then.
            pause = 1000;
        }
        timer.schedule(this::renew, pause, TimeUnit.MILLISECONDS);
    }

    private OrchestratorBlockingStub stub() {
        return OrchestratorGrpc.newBlockingStub(channel).withDeadlineAfter(Main.GRACE_SECONDS, TimeUnit.SECONDS);
    }

    /** Unregisters the subsystem. */
    @Override
    public void close() throws InterruptedException {
        timer.shutdownNow();
        if (timer.awaitTermination(Main.GRACE_SECONDS, TimeUnit.SECONDS) && registered) {
            try {
                stub().unregisterSubsystem(
                        UnregisterSubsystemRequest.newBuilder().setName(registration.getName()).build());
            } catch (StatusRuntimeException error) {
                System.err.println(orchestrator + ": " + error.getMessage());
            }
        }
        channel.shutdownNow();
    }
}
