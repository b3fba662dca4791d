// A complete subsystem in C++, made from the contract alone.
//
// Its `value` follows the sum of its inputs' `value`, by at most `step` in each cycle (a parameter, 10 by default).

#include <getopt.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/security/tls_credentials_options.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <fstream>
#include <iostream>
#include <map>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "dreamnet/orchestrator/v1/orchestrator.grpc.pb.h"
#include "dreamnet/subsystem/v1/subsystem.grpc.pb.h"

namespace pb = dreamnet::subsystem::v1;
namespace opb = dreamnet::orchestrator::v1;
using namespace std::chrono_literals;
using google::protobuf::Struct, google::protobuf::Value;
using grpc::ServerContext, grpc::Status, grpc::StatusCode;

constexpr size_t ANSWERS_KEPT = 8;                 // Cycles. A call is repeated only while its cycle runs.
constexpr std::chrono::seconds LEASE = 15s;        // Until the orchestrator unregisters a dead subsystem.
constexpr std::chrono::seconds GRACE = 5s;         // For running calls to end after a signal.
constexpr std::chrono::milliseconds POLLED = 10ms; // A waiting call looks as often whether it has been cancelled.
constexpr std::chrono::seconds FILES_READ = 60s;   // Those of TLS are read again as often.
constexpr int MAX_MESSAGE = 64 << 20;              // Bytes. Inputs can be larger than gRPC's default limit of 4 MiB.

std::optional<double> number(const Struct& of, const char* name) {
    auto field = of.fields().find(name);
    if (field == of.fields().end() || field->second.kind_case() != Value::kNumberValue) return std::nullopt;
    return field->second.number_value();
}

class Ramp final : public pb::Subsystem::Service {
public:
    // The caller is the URI in the only certificate that is accepted; empty without TLS.
    Ramp(std::string name, std::string caller) : name_(std::move(name)), caller_(std::move(caller)) {}

    Status Initialize(ServerContext* call, const pb::InitializeRequest* request, pb::InitializeResponse*) override {
        std::lock_guard lock(mutex_);
        if (Status refusal = admit(*call, request->subsystem(), request->epoch()); !refusal.ok()) return refusal;
        double step = 10;
        if (request->parameters().fields().contains("step")) step = number(request->parameters(), "step").value_or(0);
        if (!(step > 0)) return {StatusCode::INVALID_ARGUMENT, "step must be a number over 0"};
        step_ = step;
        return Status::OK;
    }

    Status RunCycle(ServerContext* call, const pb::RunCycleRequest* request, pb::RunCycleResponse* response) override {
        std::unique_lock lock(mutex_);
        if (Status refusal = admit(*call, request->subsystem(), request->epoch()); !refusal.ok()) return refusal;
        // The orchestrator calls Initialize and then RunCycle again.
        if (!step_) return {StatusCode::FAILED_PRECONDITION, "not initialized"};
        // A repeated call waits for the answer of the first one.
        if (!wait_until(lock, *call, [this] { return !working_; })) return Status::CANCELLED;
        if (answers_.count(request->cycle_id()) == 0) {
            working_ = true;
            bool done = work(lock, *call, number(request->parameters(), "work_ms").value_or(0));
            working_ = false;
            changed_.notify_all();
            if (!done) return Status::CANCELLED;
            // It may have been superseded meanwhile.
            if (Status refusal = admit(*call, request->subsystem(), request->epoch()); !refusal.ok()) return refusal;
            if (answers_.size() == ANSWERS_KEPT) answers_.erase(answers_.begin());
            answers_[request->cycle_id()] = answer(*request);
        }
        *response = answers_[request->cycle_id()];
        return Status::OK;
    }

    Status GetStatus(ServerContext* call, const pb::GetStatusRequest* request,
                     pb::GetStatusResponse* response) override {
        std::lock_guard lock(mutex_);
        auto& status = *response->mutable_status()->mutable_fields();
        status["cycles"].set_number_value(static_cast<double>(cycles_));
        status["value"].set_number_value(value_.value_or(0));
        return admit(*call, request->subsystem(), epoch_);
    }

private:
    Status admit(const ServerContext& call, const std::string& name, uint64_t epoch) {
        // The authority has signed the certificates of other subsystems as well.
        if (!caller_.empty()) {
            auto uris = call.auth_context()->FindPropertyValues("peer_uri");
            if (uris.size() != 1 || uris[0] != caller_)
                return {StatusCode::PERMISSION_DENIED, "only " + caller_ + " may call"};
        }
        if (name != name_) return {StatusCode::NOT_FOUND, "\"" + name + "\" is not here, only \"" + name_ + "\""};
        if (epoch < epoch_)
            return {StatusCode::ABORTED, "epoch " + std::to_string(epoch) + " is over, epoch " +
                                             std::to_string(epoch_) + " has called; restart " + name_ +
                                             " if that one is gone"};
        if (epoch > epoch_) { // The cycles of the older epoch have ended.
            epoch_ = epoch;
            answers_.clear();
        }
        return Status::OK;
    }

    // Simulates work. False if the call has ended before, and nothing has changed.
    bool work(std::unique_lock<std::mutex>& lock, const ServerContext& call, double milliseconds) {
        auto begun = std::chrono::steady_clock::now();
        return wait_until(lock, call, [&] {
            std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begun;
            return took.count() >= milliseconds;
        });
    }

    // Releases the lock until the condition holds. False if the deadline passes, or the caller cancels, before.
    template <typename Condition>
    bool wait_until(std::unique_lock<std::mutex>& lock, const ServerContext& call, Condition holds) {
        while (!holds()) {
            if (call.IsCancelled()) return false;
            changed_.wait_for(lock, POLLED);
        }
        return true;
    }

    pb::RunCycleResponse answer(const pb::RunCycleRequest& request) {
        pb::RunCycleResponse answer;
        auto issue = [&](pb::Severity severity, const char* code, const std::string& message) {
            pb::Issue& added = *answer.add_issues();
            added.set_severity(severity);
            added.set_code(code);
            added.set_message(message);
        };
        double sum = 0;
        for (const auto& [name, input] : request.inputs()) {
            std::optional<double> value = number(input.output(), "value");
            if (!value)
                issue(pb::SEVERITY_WARNING, "NO_VALUE", name + " gave no value");
            else if (input.freshness() == pb::FRESHNESS_STALE)
                issue(pb::SEVERITY_INFO, "STALE_VALUE",
                      name + " gave its value in cycle " + std::to_string(input.cycle_id()));
            sum += value.value_or(0);
        }
        // The first cycle has nothing to follow.
        double before = value_.value_or(sum);
        value_ = before + std::clamp(sum - before, -*step_, *step_);
        ++cycles_;
        (*answer.mutable_output()->mutable_fields())["value"].set_number_value(*value_);
        (*answer.mutable_metrics())["left"] = sum - *value_;
        return answer;
    }

    const std::string name_, caller_;
    std::mutex mutex_; // Guards all below. A call releases it while it waits for its turn or works.
    std::condition_variable changed_;
    std::optional<double> step_; // Not set before Initialize.
    uint64_t epoch_ = 0, cycles_ = 0;
    bool working_ = false;
    std::map<uint64_t, pb::RunCycleResponse> answers_; // By cycle.
    std::optional<double> value_;
};

// A file of a directory that `orchestrator certs issue` has made.
std::string read(const std::string& directory, const std::string& name) {
    std::ifstream file(directory + "/" + name);
    std::stringstream text;
    if (!(text << file.rdbuf())) throw std::runtime_error("can't read " + directory + "/" + name);
    return text.str();
}

// TLS with clients that have a certificate. Changed files are used for new connections.
std::shared_ptr<grpc::ServerCredentials> server_credentials(const std::string& directory) {
    if (directory.empty()) return grpc::InsecureServerCredentials();
    // Otherwise it would only be noticed by the first connection.
    for (const char* name : {"key.pem", "cert.pem", "ca.pem"}) read(directory, name);
    grpc::experimental::TlsServerCredentialsOptions options(
        std::make_shared<grpc::experimental::FileWatcherCertificateProvider>(
            directory + "/key.pem", directory + "/cert.pem", directory + "/ca.pem", FILES_READ.count()));
    options.watch_root_certs();
    options.watch_identity_key_cert_pairs();
    options.set_cert_request_type(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
    return grpc::experimental::TlsServerCredentials(options);
}

// Registers with a lease and renews it, in a thread of its own. Retries without a limit. Its end unregisters.
class Lease {
public:
    Lease(opb::Registration registration, std::string orchestrator, std::string directory)
        : registration_(std::move(registration)), orchestrator_(std::move(orchestrator)),
          directory_(std::move(directory)), thread_([this] { run(); }) {}

    ~Lease() {
        std::unique_lock lock(mutex_);
        stopping_ = true;
        lock.unlock();
        changed_.notify_all();
        thread_.join();
    }

private:
    void run() {
        std::unique_lock lock(mutex_);
        while (!stopping_) {
            lock.unlock();
            Status status = registered_ ? call(&Stub::RenewLease, named<opb::RenewLeaseRequest>())
                                        : call(&Stub::RegisterSubsystem, registering());
            lock.lock();
            if (status.ok()) registered_ = true;
            // The lease has expired, or the subsystem was registered without one.
            if (status.error_code() == StatusCode::NOT_FOUND || status.error_code() == StatusCode::FAILED_PRECONDITION)
                registered_ = false;
            changed_.wait_for(lock, status.ok() ? LEASE / 3 : 1s, [this] { return stopping_; });
        }
        if (registered_)
            call(&Stub::UnregisterSubsystem, named<opb::UnregisterSubsystemRequest>());
    }

    using Stub = opb::Orchestrator::Stub;

    template <typename Response, typename Request>
    Status call(Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*), const Request& request) {
        Status status;
        try {
            if (!stub_) stub_ = connect();
            grpc::ClientContext context;
            context.set_deadline(std::chrono::system_clock::now() + GRACE);
            Response response;
            status = (stub_.get()->*method)(&context, request, &response);
        } catch (const std::runtime_error& unreadable) { // The files of a certificate are being replaced.
            status = {StatusCode::UNAVAILABLE, unreadable.what()};
        }
        if (!status.ok()) {
            std::cerr << orchestrator_ << ": " << status.error_message() << std::endl;
            stub_ = nullptr; // The new connection uses the certificate as it is then.
        }
        return status;
    }

    std::unique_ptr<Stub> connect() const {
        auto credentials = grpc::InsecureChannelCredentials();
        if (!directory_.empty())
            credentials = grpc::SslCredentials(
                {read(directory_, "ca.pem"), read(directory_, "key.pem"), read(directory_, "cert.pem")});
        grpc::ChannelArguments own;
        own.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
        return opb::Orchestrator::NewStub(grpc::CreateCustomChannel(orchestrator_, credentials, own));
    }

    opb::RegisterSubsystemRequest registering() const {
        opb::RegisterSubsystemRequest request;
        *request.mutable_registration() = registration_;
        request.mutable_lease()->set_seconds(LEASE.count());
        return request;
    }

    template <typename Request>
    Request named() const {
        Request request;
        request.set_name(registration_.name());
        return request;
    }

    const opb::Registration registration_;
    const std::string orchestrator_, directory_;
    std::unique_ptr<Stub> stub_;
    bool registered_ = false;
    std::mutex mutex_; // Guards `stopping_`.
    std::condition_variable changed_;
    bool stopping_ = false;
    std::thread thread_; // Last, since it uses the others.
};

int main(int count, char* arguments[]) try {
    std::map<std::string, std::string> flags = {{"listen", "127.0.0.1:50055"}, {"name", "ramp"},
        {"caller", "spiffe://fleet/core"}, {"orchestrator", ""}, {"credentials", ""}, {"requires", ""}, {"after", ""},
        {"reads", ""}};
    std::vector<option> options;
    for (const auto& [name, value] : flags) options.push_back({name.c_str(), required_argument, nullptr, 0});
    options.push_back({});
    for (int at, code; (code = getopt_long(count, arguments, "", options.data(), &at)) != -1;) {
        if (code == '?') return 2;
        flags[options[at].name] = optarg;
    }

    // No thread takes these signals but the one that waits for them, below.
    sigset_t signals;
    sigemptyset(&signals);
    for (int signal : {SIGTERM, SIGINT}) sigaddset(&signals, signal);
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);

    const std::string& directory = flags["credentials"];
    Ramp ramp(flags["name"], directory.empty() ? "" : flags["caller"]);
    grpc::EnableDefaultHealthCheckService(true);
    int port = 0;
    grpc::ServerBuilder builder;
    // Without SO_REUSEPORT a second process on the same port fails, instead of getting half of the connections.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.SetMaxReceiveMessageSize(MAX_MESSAGE);
    builder.RegisterService(&ramp);
    builder.AddListeningPort(flags["listen"], server_credentials(directory), &port);
    std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
    if (!server) throw std::runtime_error("can't listen on " + flags["listen"]);
    std::string address = flags["listen"].substr(0, flags["listen"].rfind(':') + 1) + std::to_string(port);
    std::cout << "listening on " << address << std::endl;

    std::optional<Lease> lease;
    if (!flags["orchestrator"].empty()) {
        opb::Registration registration;
        registration.set_name(flags["name"]);
        registration.set_endpoint((directory.empty() ? "http://" : "https://") + address);
        // By name, since `requires` is a keyword of C++20: the name of its accessor depends on the version of protoc.
        for (const char* list : {"requires", "after", "reads"}) {
            std::stringstream names(flags[list]);
            for (std::string name; std::getline(names, name, ',');)
                registration.GetReflection()->AddString(
                    &registration, registration.GetDescriptor()->FindFieldByName(list), name);
        }
        lease.emplace(registration, flags["orchestrator"], directory);
    }
    int signal;
    sigwait(&signals, &signal);
    lease.reset(); // Unregisters the subsystem.
    server->GetHealthCheckService()->SetServingStatus(false);
    server->Shutdown(std::chrono::system_clock::now() + GRACE);
    return 0;
} catch (const std::runtime_error& error) {
    std::cerr << error.what() << std::endl;
    return 1;
}
