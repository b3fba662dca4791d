package dreamnet.example;

import com.google.protobuf.Struct;
import com.google.protobuf.Value;
import dreamnet.subsystem.v1.SubsystemGrpc;
import dreamnet.subsystem.v1.SubsystemOuterClass.Freshness;
import dreamnet.subsystem.v1.SubsystemOuterClass.GetStatusRequest;
import dreamnet.subsystem.v1.SubsystemOuterClass.GetStatusResponse;
import dreamnet.subsystem.v1.SubsystemOuterClass.InitializeRequest;
import dreamnet.subsystem.v1.SubsystemOuterClass.InitializeResponse;
import dreamnet.subsystem.v1.SubsystemOuterClass.Input;
import dreamnet.subsystem.v1.SubsystemOuterClass.Issue;
import dreamnet.subsystem.v1.SubsystemOuterClass.RunCycleRequest;
import dreamnet.subsystem.v1.SubsystemOuterClass.RunCycleResponse;
import dreamnet.subsystem.v1.SubsystemOuterClass.Severity;
import io.grpc.Context;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.StreamObserver;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.concurrent.Callable;
import java.util.concurrent.TimeUnit;
import java.util.function.BooleanSupplier;

/**
 * A complete subsystem in Java, made from the contract alone.
 *
 * <p>It adds up the {@code value} of its inputs and forecasts the sum of the next cycle from its recent growth. Its
 * parameter {@code smoothing}, over 0 and up to 1, is the weight of the latest growth.
 */
final class Forecast extends SubsystemGrpc.SubsystemImplBase {
    /** Cycles. A call is repeated only while its cycle runs. */
    private static final int ANSWERS_KEPT = 8;

    private final String name;

    // All state is guarded by `this`, which a call releases while it waits for its turn or works.
    private boolean initialized;
    private long epoch;
    private double smoothing;
    private double value;
    private double growth;
    private int cycles;
    private boolean working;
    private final Map<Long, RunCycleResponse> answers = new LinkedHashMap<>() {
        @Override
        protected boolean removeEldestEntry(Map.Entry<Long, RunCycleResponse> eldest) {
            return size() > ANSWERS_KEPT;
        }
    };

    Forecast(String name) {
        this.name = name;
    }

    @Override
    public void initialize(InitializeRequest request, StreamObserver<InitializeResponse> observer) {
        answer(observer, () -> initialize(request));
    }

    @Override
    public void runCycle(RunCycleRequest request, StreamObserver<RunCycleResponse> observer) {
        answer(observer, () -> runCycle(request));
    }

    @Override
    public void getStatus(GetStatusRequest request, StreamObserver<GetStatusResponse> observer) {
        answer(observer, () -> getStatus(request));
    }

    private synchronized InitializeResponse initialize(InitializeRequest request) {
        admit(request.getSubsystem(), request.getEpoch());
        Value given = request.getParameters().getFieldsOrDefault("smoothing", number(0.5));
        if (!(given.getNumberValue() > 0 && given.getNumberValue() <= 1)) {
            throw Status.INVALID_ARGUMENT.withDescription("smoothing must be over 0 and at most 1").asRuntimeException();
        }
        smoothing = given.getNumberValue();
        initialized = true;
        return InitializeResponse.getDefaultInstance();
    }

    private synchronized RunCycleResponse runCycle(RunCycleRequest request) throws InterruptedException {
        admit(request.getSubsystem(), request.getEpoch());
        if (!initialized) { // The orchestrator calls Initialize and then RunCycle again.
            throw Status.FAILED_PRECONDITION.withDescription("not initialized").asRuntimeException();
        }
        waitUntil(() -> !working, Long.MAX_VALUE); // A repeated call waits for the answer of the first one.
        RunCycleResponse first = answers.get(request.getCycleId());
        if (first != null) {
            return first;
        }
        working = true;
        try {
            work(request);
        } finally {
            working = false;
            notifyAll();
        }
        admit(request.getSubsystem(), request.getEpoch()); // It may have been superseded meanwhile.
        RunCycleResponse answer = forecast(request.getInputsMap());
        answers.put(request.getCycleId(), answer);
        return answer;
    }

    private synchronized GetStatusResponse getStatus(GetStatusRequest request) {
        admit(request.getSubsystem(), epoch);
        Struct status = Struct.newBuilder()
                .putFields("cycles", number(cycles))
                .putFields("value", number(value))
                .putFields("growth", number(growth))
                .build();
        return GetStatusResponse.newBuilder().setStatus(status).build();
    }

    private void admit(String called, long callersEpoch) {
        if (!called.equals(name)) {
            String message = String.format("\"%s\" is not here, only \"%s\"", called, name);
            throw Status.NOT_FOUND.withDescription(message).asRuntimeException();
        }
        if (Long.compareUnsigned(callersEpoch, epoch) < 0) {
            String message = "epoch %d is over, epoch %d has called; restart %s if that one is gone".formatted(callersEpoch, epoch, name);
            throw Status.ABORTED.withDescription(message).asRuntimeException();
        }
        if (callersEpoch != epoch) { // The cycles of the older epoch have ended.
            epoch = callersEpoch;
            answers.clear();
        }
    }

    /** Simulates work for {@code work_ms} milliseconds (a parameter). */
    private void work(RunCycleRequest request) throws InterruptedException {
        Value given = request.getParameters().getFieldsOrDefault("work_ms", number(0));
        waitUntil(() -> false, (long) given.getNumberValue());
    }

    private RunCycleResponse forecast(Map<String, Input> inputs) {
        RunCycleResponse.Builder answer = RunCycleResponse.newBuilder();
        double sum = 0;
        for (Map.Entry<String, Input> input : inputs.entrySet()) {
            Input given = input.getValue();
            Value value = given.getOutput().getFieldsOrDefault("value", Value.getDefaultInstance());
            if (!value.hasNumberValue()) {
                answer.addIssues(issue(Severity.SEVERITY_WARNING, "NO_VALUE", input.getKey() + " gave no value"));
                continue;
            }
            if (given.getFreshness() == Freshness.FRESHNESS_STALE) {
                String message = input.getKey() + " gave its value in cycle " + given.getCycleId();
                answer.addIssues(issue(Severity.SEVERITY_INFO, "STALE_VALUE", message));
            }
            sum += value.getNumberValue();
        }
        if (cycles > 0) {
            growth += smoothing * (sum - value - growth);
        }
        value = sum;
        cycles++;
        return answer.setOutput(Struct.newBuilder().putFields("value", number(value + growth)))
                .putMetrics("growth", growth)
                .build();
    }

    /**
     * Waits until a condition holds or this time has passed. Fails when the call's deadline has passed or its caller
     * has cancelled it.
     */
    private void waitUntil(BooleanSupplier holds, long millis) throws InterruptedException {
        Context call = Context.current();
        Context.CancellationListener wake = cancelled -> {
            synchronized (this) {
                notifyAll();
            }
        };
        call.addListener(wake, Runnable::run);
        try {
            long started = System.nanoTime();
            while (!holds.getAsBoolean()) {
                if (call.isCancelled()) {
                    throw Status.CANCELLED.withDescription("the call was cancelled").asRuntimeException();
                }
                long left = millis - TimeUnit.NANOSECONDS.toMillis(System.nanoTime() - started);
                if (left <= 0) {
                    return;
                }
                wait(left);
            }
        } finally {
            call.removeListener(wake);
        }
    }

    private static <T> void answer(StreamObserver<T> observer, Callable<T> call) {
        T answer;
        try {
            answer = call.call();
        } catch (StatusRuntimeException refusal) {
            observer.onError(refusal);
            return;
        } catch (Exception failure) {
            failure.printStackTrace(); // The caller gets only the message.
            observer.onError(Status.INTERNAL.withDescription(failure.toString()).asRuntimeException());
            return;
        }
        observer.onNext(answer);
        observer.onCompleted();
    }

    private static Value number(double number) {
        return Value.newBuilder().setNumberValue(number).build();
    }

    private static Issue issue(Severity severity, String code, String message) {
        return Issue.newBuilder().setSeverity(severity).setCode(code).setMessage(message).build();
    }
}
