# A complete subsystem in Ruby, made from the contract alone.
#
# Its `value` is a quantile of its inputs' `value`: the median, unless the parameter `quantile`, 0 to 1, says otherwise.

require "optparse"
require "openssl"

$LOAD_PATH.unshift(__dir__)
require "grpc"
require "google/protobuf/well_known_types"
require "grpc/health/checker"
require "dreamnet/subsystem/v1/subsystem_services_pb"
require "dreamnet/orchestrator/v1/orchestrator_services_pb"

Contract = Dreamnet::Subsystem::V1
Orchestrator = Dreamnet::Orchestrator::V1

ANSWERS_KEPT = 8 # Cycles. A call is repeated only while its cycle runs.
LEASE = 15 # Seconds until the orchestrator unregisters a dead subsystem.
GRACE = 5 # Seconds for running calls to end after a signal.
MAX_MESSAGE = 64 << 20 # Bytes. Inputs can be larger than gRPC's default limit of 4 MiB.

# What the subsystem does. Any thread may call its methods.
class Quantile
  def initialize(name, caller)
    @name = name
    @caller = caller # The URI in the only certificate that is accepted. nil without TLS.
    @lock = Mutex.new # Guards all below. A call releases it while it waits for its turn or works.
    @changed = ConditionVariable.new
    @epoch = 0
    @quantile = nil # nil means that it is not initialized.
    @cycle = nil # The cycle of the latest call.
    @working = false
    @answers = {} # By cycle, oldest first.
    @cycles = 0
  end

  def prepare(request, call)
    @lock.synchronize do
      admit(request, call)
      quantile = field(request.parameters, "quantile", 0.5)
      unless quantile.is_a?(Float) && quantile.between?(0, 1)
        raise GRPC::InvalidArgument, "quantile is #{quantile.inspect}, not 0 to 1"
      end
      @quantile = quantile
      Contract::InitializeResponse.new
    end
  end

  def run_cycle(request, call)
    @lock.synchronize do
      admit(request, call)
      # The orchestrator calls Initialize and then RunCycle again.
      raise GRPC::FailedPrecondition, "not initialized" unless @quantile
      @cycle = request.cycle_id
      @changed.broadcast # The call of an earlier cycle gives up its turn.
      wait(request, call) { !@working } # A repeated call waits for the answer of the first one.
      @answers[request.cycle_id] ||= work(request, call)
    end
  end

  def get_status(request, call)
    @lock.synchronize do
      admit(request, call, @epoch)
      Contract::GetStatusResponse.new(status: Google::Protobuf::Struct.from_hash("cycles" => @cycles))
    end
  end

  private

  def admit(request, call, epoch = request.epoch)
    # The authority has signed the certificates of other subsystems as well.
    raise GRPC::PermissionDenied, "only #{@caller} may call" unless @caller.nil? || uris(call.peer_cert) == [@caller]
    unless request.subsystem == @name
      raise GRPC::NotFound, "#{request.subsystem.inspect} is not here, only #{@name.inspect}"
    end
    if epoch < @epoch
      raise GRPC::Aborted, "epoch #{epoch} is over, epoch #{@epoch} has called; restart #{@name} if that one is gone"
    end
    return if epoch == @epoch
    @epoch = epoch # The cycles of the older epoch have ended.
    @answers.clear
  end

  # Simulates work for `work_ms` milliseconds (a parameter). If the call ends before, nothing has changed.
  def work(request, call)
    @working = true
    wait(request, call, field(request.parameters, "work_ms", 0) / 1000.0)
    admit(request, call) # It may have been superseded meanwhile.
    @answers.shift if @answers.size == ANSWERS_KEPT
    answer(request.inputs)
  ensure
    @working = false
    @changed.broadcast
  end

  # Waits until the block is true, or for this time. Fails when nobody waits for the call's answer any more: its
  # deadline has passed, or a call of another cycle has come. gRPC does not tell a handler in Ruby that its caller has
  # cancelled.
  def wait(request, call, seconds = nil)
    time = Process.clock_gettime(Process::CLOCK_MONOTONIC)
    ends = seconds && time + seconds
    late = time + (call.deadline - Time.now) if call.deadline.to_i.positive? # Without a deadline, it is before 1970.
    until block_given? && yield
      time = Process.clock_gettime(Process::CLOCK_MONOTONIC)
      return if ends && time >= ends
      raise GRPC::DeadlineExceeded, "the deadline has passed" if late && time >= late
      raise GRPC::Cancelled, "cycle #{@cycle} has begun" if @cycle != request.cycle_id
      @changed.wait(@lock, [ends, late].compact.min&.-(time))
    end
  end

  def answer(inputs)
    answer = Contract::RunCycleResponse.new
    issue = ->(*of) { answer.issues << Contract::Issue.new(%i[severity code message].zip(of).to_h) }
    values = inputs.to_a.sort.filter_map do |name, input|
      value = field(input.output, "value")
      if !value.is_a?(Float)
        issue.(:SEVERITY_WARNING, "NO_VALUE", "#{name} gave no value")
      elsif input.freshness == :FRESHNESS_STALE
        issue.(:SEVERITY_INFO, "STALE_VALUE", "#{name} gave its value in cycle #{input.cycle_id}")
      end
      value if value.is_a?(Float)
    end
    @cycles += 1
    value = values.sort[(@quantile * (values.size - 1)).round] unless values.empty?
    answer.output = Google::Protobuf::Struct.from_hash(value ? { "value" => value } : {})
    answer.metrics["values"] = values.size
    answer
  end

  def field(struct, name, default = nil)
    value = struct&.fields&.[](name)
    value ? value.to_ruby : default
  end

  # The URIs in a certificate.
  def uris(pem)
    names = OpenSSL::X509::Certificate.new(pem).extensions.find { |it| it.oid == "subjectAltName" }
    type = 6 # Of a URI: RFC 5280, 4.2.1.6.
    names ? OpenSSL::ASN1.decode(names.value_der).value.select { |it| it.tag == type }.map(&:value) : []
  end
end

# The service. gRPC calls the method `initialize` for the RPC Initialize, and Ruby calls it for each `new`. So `of`
# makes the object without `new`, and what needs a constructor is in another object, to which this one delegates.
class Service < Contract::Subsystem::Service
  def self.of(quantile)
    allocate.tap { |service| service.instance_variable_set(:@quantile, quantile) }
  end

  def initialize(request, call)
    answer { @quantile.prepare(request, call) }
  end

  def run_cycle(request, call)
    answer { @quantile.run_cycle(request, call) }
  end

  def get_status(request, call)
    answer { @quantile.get_status(request, call) }
  end

  private

  def answer
    yield
  rescue GRPC::BadStatus
    raise
  rescue StandardError => e
    warn e.full_message # The caller gets only the message.
    raise GRPC::Internal, e.message
  end
end

# Registers with a lease and renews it, in a thread of its own. Retries without a limit.
class Lease
  def initialize(registration, orchestrator, credentials)
    @registration, @orchestrator, @credentials = registration, orchestrator, credentials
    @registered = false
    @stopping = false
    @lock, @stopped = Mutex.new, ConditionVariable.new
    @thread = Thread.new { run }
  end

  # Ends, and unregisters the subsystem.
  def stop
    @lock.synchronize { @stopping = true and @stopped.broadcast }
    @thread.join
    return unless @registered
    connect.unregister_subsystem(
      Orchestrator::UnregisterSubsystemRequest.new(name: @registration.name), deadline: Time.now + GRACE
    )
  rescue StandardError => e
    warn "#{@orchestrator}: #{e.message}"
  end

  private

  def run
    until @stopping
      begin
        stub ||= connect # After a failure, the new connection uses the certificate as it is then.
        renew(stub)
        pause(LEASE / 3.0)
      rescue StandardError => e
        warn "#{@orchestrator}: #{e.message}"
        # The lease has expired, or the subsystem was registered without one.
        @registered = false if e.is_a?(GRPC::NotFound) || e.is_a?(GRPC::FailedPrecondition)
        stub = nil
        pause(1)
      end
    end
  end

  def renew(stub)
    if @registered
      stub.renew_lease(Orchestrator::RenewLeaseRequest.new(name: @registration.name), deadline: Time.now + GRACE)
    else
      lease = Google::Protobuf::Duration.new(seconds: LEASE)
      request = Orchestrator::RegisterSubsystemRequest.new(registration: @registration, lease: lease)
      stub.register_subsystem(request, deadline: Time.now + GRACE)
      @registered = true
    end
  end

  def connect
    credentials = :this_channel_is_insecure
    if @credentials
      key, certificate, authority = read(@credentials)
      credentials = GRPC::Core::ChannelCredentials.new(authority, key, certificate)
    end
    Orchestrator::Orchestrator::Stub.new(
      @orchestrator, credentials, channel_args: { "grpc.use_local_subchannel_pool" => 1 }
    )
  end

  def pause(seconds)
    @lock.synchronize { @stopped.wait(@lock, seconds) unless @stopping }
  end
end

# The key, the certificate and the authority in a directory that `orchestrator certs issue` has made.
def read(directory)
  %w[key.pem cert.pem ca.pem].map { |name| File.read(File.join(directory, name)) }
end

# TLS with clients that have a certificate. The files are read only here.
def server_credentials(directory)
  key, certificate, authority = read(directory)
  GRPC::Core::ServerCredentials.new(authority, [{ private_key: key, cert_chain: certificate }], true)
end

def options
  options = { listen: "127.0.0.1:50054", name: "quantile", caller: "spiffe://fleet/core" }
  OptionParser.new do |parser|
    parser.on("--listen HOST:PORT", /\A.+:\d{1,5}\z/, "default: #{options[:listen]}")
    parser.on("--name NAME", "the subsystem's name (default: #{options[:name]})")
    parser.on("--orchestrator HOST:PORT", "with which to register (default: not registered)")
    parser.on("--credentials DIR", "cert.pem, key.pem and ca.pem for TLS (default: no TLS)")
    parser.on("--caller URI", "with TLS: the URI of the orchestrator (default: #{options[:caller]})")
    %w[requires after reads].each { |list| parser.on("--#{list} A,B", Array, "names of other subsystems") }
  end.parse!(into: options)
  options
rescue OptionParser::ParseError => e
  warn e.message
  exit 2
end

def main(listen:, name:, caller:, orchestrator: nil, credentials: nil, requires: [], after: [], reads: [])
  # Without SO_REUSEPORT a second process on the same port fails, instead of getting half of the connections.
  server = GRPC::RpcServer.new(
    poll_period: GRACE,
    server_args: { "grpc.so_reuseport" => 0, "grpc.max_receive_message_length" => MAX_MESSAGE }
  )
  server.handle(Service.of(Quantile.new(name, credentials && caller)))
  health = Grpc::Health::Checker.new
  health.add_status("", :SERVING)
  server.handle(health)
  port = server.add_http2_port(listen, credentials ? server_credentials(credentials) : :this_port_is_insecure)
  address = "#{listen.rpartition(":").first}:#{port}"

  stop = Queue.new
  %w[TERM INT].each { |signal| trap(signal) { stop << signal } }
  serving = Thread.new { server.run }
  server.wait_till_running
  puts "listening on #{address}"
  $stdout.flush
  if orchestrator
    endpoint = "#{credentials ? "https" : "http"}://#{address}"
    registration = Orchestrator::Registration.new(name:, endpoint:, requires:, after:, reads:)
    lease = Lease.new(registration, orchestrator, credentials)
  end

  stop.pop
  lease&.stop
  health.add_status("", :NOT_SERVING)
  server.stop
  serving.join
rescue RuntimeError, SystemCallError => e # A port that is in use, or files that can't be read.
  abort e.message
end

main(**options)
