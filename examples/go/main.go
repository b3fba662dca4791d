// A complete subsystem in Go, made from the contract alone.
//
// It adds up the `value` of its inputs, and raises an alarm
// when the sum is over its parameter `limit`.
package main

//go:generate sh generate.sh

import (
	"context"
	"flag"
	"fmt"
	"log"
	"maps"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	orchestratorpb "dreamnet.example/alarm/dreamnet/orchestrator/v1"
	pb "dreamnet.example/alarm/dreamnet/subsystem/v1"
)

const (
	answersKept = 8                // Cycles. A call is repeated only while its cycle runs.
	lease       = 15 * time.Second // Until the orchestrator unregisters a dead subsystem.
	grace       = 5 * time.Second  // For running calls to end after a signal.
	maxMessage  = 64 << 20         // Bytes. Inputs can be larger than gRPC's default limit of 4 MiB.
)

type alarm struct {
	pb.UnimplementedSubsystemServer
	name string
	turn chan struct{} // Holds one token while a cycle is in progress. Unlike mu, a wait for it can be cancelled.

	mu          sync.Mutex // Guards the fields below, and is never held for long.
	initialized bool
	epoch       uint64
	limit       float64
	over        int // Number of consecutive cycles.
	cycles      int
	answers     map[uint64]*pb.RunCycleResponse
	answered    []uint64 // The keys of answers, oldest first.
}

func newAlarm(name string) *alarm {
	return &alarm{name: name, turn: make(chan struct{}, 1), answers: map[uint64]*pb.RunCycleResponse{}}
}

func (a *alarm) Initialize(_ context.Context, request *pb.InitializeRequest) (*pb.InitializeResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.admit(request.Subsystem, request.Epoch); err != nil {
		return nil, err
	}
	a.limit = 100
	if given, ok := request.Parameters.GetFields()["limit"]; ok {
		limit, ok := given.Kind.(*structpb.Value_NumberValue)
		if !ok {
			return nil, status.Errorf(codes.InvalidArgument, "limit is %v, not a number", given)
		}
		a.limit = limit.NumberValue
	}
	a.initialized = true
	return &pb.InitializeResponse{}, nil
}

func (a *alarm) RunCycle(ctx context.Context, request *pb.RunCycleRequest) (*pb.RunCycleResponse, error) {
	if err := a.ready(request); err != nil {
		return nil, err
	}
	select { // A repeated call waits here for the answer of the first one.
	case a.turn <- struct{}{}:
		defer func() { <-a.turn }()
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	if answer := a.answer(request.CycleId); answer != nil {
		return answer, nil
	}
	if err := work(ctx, request); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.admit(request.Subsystem, request.Epoch); err != nil { // It may have been superseded meanwhile.
		return nil, err
	}
	answer := a.add(request.Inputs)
	a.answers[request.CycleId] = answer
	a.answered = append(a.answered, request.CycleId)
	if len(a.answered) > answersKept {
		delete(a.answers, a.answered[0])
		a.answered = a.answered[1:]
	}
	return answer, nil
}

func (a *alarm) GetStatus(_ context.Context, request *pb.GetStatusRequest) (*pb.GetStatusResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.admit(request.Subsystem, a.epoch); err != nil {
		return nil, err
	}
	return &pb.GetStatusResponse{Status: object(map[string]any{"cycles": a.cycles, "over": a.over})}, nil
}

// admit refuses calls for other names and from superseded callers. The caller holds mu.
func (a *alarm) admit(name string, epoch uint64) error {
	if name != a.name {
		return status.Errorf(codes.NotFound, "%q is not here, only %q", name, a.name)
	}
	if epoch < a.epoch {
		return status.Errorf(codes.Aborted, "epoch %d is over, epoch %d has called; restart %s if that one is gone", epoch, a.epoch, a.name)
	}
	if epoch > a.epoch { // The cycles of the older epoch have ended.
		a.epoch = epoch
		clear(a.answers)
		a.answered = nil
	}
	return nil
}

func (a *alarm) ready(request *pb.RunCycleRequest) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.admit(request.Subsystem, request.Epoch); err != nil {
		return err
	}
	if !a.initialized { // The orchestrator calls Initialize and then RunCycle again.
		return status.Error(codes.FailedPrecondition, "not initialized")
	}
	return nil
}

func (a *alarm) answer(cycle uint64) *pb.RunCycleResponse {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.answers[cycle]
}

// work simulates work for `work_ms` milliseconds (a parameter). It ends early when the deadline passes or the caller
// cancels, before anything has changed.
func work(ctx context.Context, request *pb.RunCycleRequest) error {
	ms := request.Parameters.GetFields()["work_ms"].GetNumberValue()
	select {
	case <-time.After(time.Duration(ms * float64(time.Millisecond))):
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

func (a *alarm) add(inputs map[string]*pb.Input) *pb.RunCycleResponse {
	answer := &pb.RunCycleResponse{}
	issue := func(severity pb.Severity, code, format string, args ...any) {
		answer.Issues = append(answer.Issues,
			&pb.Issue{Severity: severity, Code: code, Message: fmt.Sprintf(format, args...)})
	}
	sum := 0.0
	for _, name := range slices.Sorted(maps.Keys(inputs)) {
		input := inputs[name]
		value, ok := input.Output.GetFields()["value"].GetKind().(*structpb.Value_NumberValue)
		if !ok {
			issue(pb.Severity_SEVERITY_WARNING, "NO_VALUE", "%s gave no value", name)
			continue
		}
		if input.Freshness == pb.Freshness_FRESHNESS_STALE {
			issue(pb.Severity_SEVERITY_INFO, "STALE_VALUE", "%s gave its value in cycle %d", name, input.CycleId)
		}
		sum += value.NumberValue
	}
	if sum > a.limit {
		a.over++
		issue(pb.Severity_SEVERITY_WARNING, "OVER_LIMIT", "%g is over %g", sum, a.limit)
	} else {
		a.over = 0
	}
	a.cycles++
	answer.Output = object(map[string]any{"value": sum, "alarm": a.over > 0})
	answer.Metrics = map[string]float64{"over": float64(a.over)}
	return answer
}

// object makes a Struct of values that a Struct can represent.
func object(fields map[string]any) *structpb.Struct {
	made, err := structpb.NewStruct(fields)
	if err != nil {
		panic(err)
	}
	return made
}

// stayRegistered registers with a lease and renews it until ctx ends. Retries without a limit.
func stayRegistered(ctx context.Context, registration *orchestratorpb.Registration, orchestrator, credentialsDir string) {
	registered := false
	renew := func(client orchestratorpb.OrchestratorClient) (err error) {
		call, cancel := context.WithTimeout(ctx, grace)
		defer cancel()
		if registered {
			_, err = client.RenewLease(call, &orchestratorpb.RenewLeaseRequest{Name: registration.Name})
		} else {
			_, err = client.RegisterSubsystem(call, &orchestratorpb.RegisterSubsystemRequest{
				Registration: registration, Lease: durationpb.New(lease)})
		}
		registered = registered || err == nil
		return err
	}
	for ctx.Err() == nil {
		// After a failure, the new connection uses the certificate as it is then.
		err := connected(orchestrator, credentialsDir, func(client orchestratorpb.OrchestratorClient) (err error) {
			for ctx.Err() == nil && err == nil {
				if err = renew(client); err == nil {
					pause(ctx, lease/3)
				}
			}
			return err
		})
		if err != nil && ctx.Err() == nil {
			log.Printf("%s: %v", orchestrator, err)
			// The lease has expired, or the subsystem was registered without one.
			gone := status.Code(err) == codes.NotFound || status.Code(err) == codes.FailedPrecondition
			registered = registered && !gone
			pause(ctx, time.Second)
		}
	}
	if registered {
		connected(orchestrator, credentialsDir, func(client orchestratorpb.OrchestratorClient) error {
			last, cancel := context.WithTimeout(context.Background(), grace)
			defer cancel()
			_, err := client.UnregisterSubsystem(last, &orchestratorpb.UnregisterSubsystemRequest{Name: registration.Name})
			return err
		})
	}
}

// connected lets do use a connection to the orchestrator.
func connected(orchestrator, credentialsDir string, do func(orchestratorpb.OrchestratorClient) error) error {
	transport, err := clientCredentials(credentialsDir)
	if err != nil {
		return err
	}
	connection, err := grpc.NewClient(orchestrator, grpc.WithTransportCredentials(transport))
	if err != nil {
		return err
	}
	defer connection.Close()
	return do(orchestratorpb.NewOrchestratorClient(connection))
}

// pause waits, or until ctx ends.
func pause(ctx context.Context, duration time.Duration) {
	select {
	case <-time.After(duration):
	case <-ctx.Done():
	}
}

func main() {
	listen := flag.String("listen", "127.0.0.1:50052", "host:port")
	name := flag.String("name", "alarm", "the subsystem's name")
	orchestrator := flag.String("orchestrator", "", "host:port to register with (default: not registered)")
	credentialsDir := flag.String("credentials", "", "directory with cert.pem, key.pem and ca.pem for TLS (default: no TLS)")
	caller := flag.String("caller", "spiffe://fleet/core", "with TLS: the URI of the orchestrator")
	registration := &orchestratorpb.Registration{}
	names := func(into *[]string) func(string) error {
		return func(text string) error {
			*into = strings.FieldsFunc(text, func(c rune) bool { return c == ',' })
			return nil
		}
	}
	flag.Func("requires", "names of other subsystems: a,b", names(&registration.Requires))
	flag.Func("after", "names of other subsystems: a,b", names(&registration.After))
	flag.Func("reads", "names of other subsystems: a,b", names(&registration.Reads))
	flag.Parse()

	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		log.Fatal(err)
	}
	transport, err := serverCredentials(*credentialsDir, *caller)
	if err != nil {
		log.Fatal(err)
	}
	// A silent connection would delay the stop for two minutes.
	server := grpc.NewServer(grpc.Creds(transport), grpc.MaxRecvMsgSize(maxMessage), grpc.ConnectionTimeout(grace))
	pb.RegisterSubsystemServer(server, newAlarm(*name))
	healthy := health.NewServer()
	healthpb.RegisterHealthServer(server, healthy)

	scheme := "http://"
	if *credentialsDir != "" {
		scheme = "https://"
	}
	asked, forget := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer forget()
	var stopped sync.WaitGroup
	stopped.Go(func() {
		fmt.Println("listening on", listener.Addr())
		if *orchestrator != "" {
			registration.Name = *name
			registration.Endpoint = scheme + listener.Addr().String()
			stayRegistered(asked, registration, *orchestrator, *credentialsDir)
		}
		<-asked.Done()
		healthy.Shutdown()
		defer time.AfterFunc(grace, server.Stop).Stop()
		server.GracefulStop()
	})
	if err := server.Serve(listener); err != nil {
		log.Fatal(err)
	}
	stopped.Wait()
}
