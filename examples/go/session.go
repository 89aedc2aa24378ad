// A client of stepwire.v1 for one training loop, written from proto/ and docs/protocol.md alone.

package main

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"math"
	mathrand "math/rand"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "stepwire.example/digits/stepwirev1"
)

const (
	firstPause   = 50 * time.Millisecond
	longestPause = 2 * time.Second
	float32Bytes = 4
)

// Session is one session, stepped over one attached stream.
type Session struct {
	// CutBefore and CutAfter name steps at which the stream is cut once, for trials: before the commit, or after it.
	CutBefore, CutAfter uint64
	// Attached counts the attachments of the stream, and Replayed the replies that a server gave a second time.
	Attached, Replayed int

	connection    *grpc.ClientConn
	client        pb.OptimizerServiceClient
	id            string
	size          uint64
	token         uint64
	epoch         uint64
	load          uint64
	appliedStep   uint64
	chunkElements int
	timeout       time.Duration
	stream        pb.OptimizerService_AttachClient
	leave         context.CancelFunc
}

// CreateSession makes a session with Adam and with parameters in it, on a server without TLS.
func CreateSession(
	target string, tensors []*pb.TensorSpec, parameters []float32, lr float64, chunkElements int,
) (*Session, error) {
	// gRPC's own retry is off: a step is repeated by its number.
	connection, err := grpc.Dial(target, grpc.WithInsecure(), grpc.WithDisableRetry())
	if err != nil {
		return nil, err
	}
	session := &Session{
		connection: connection, client: pb.NewOptimizerServiceClient(connection),
		chunkElements: chunkElements, timeout: time.Minute,
	}
	request := &pb.CreateSessionRequest{
		RequestId: randomID(),
		Config: &pb.SessionConfig{
			Tensors: tensors,
			Optimizer: &pb.Optimizer{
				Rule:            pb.Rule_RULE_ADAM,
				Hyperparameters: &pb.Hyperparameters{Lr: &lr},
			},
			Initialization: pb.Initialization_INITIALIZATION_LOAD,
			Label:          "digits in Go",
		},
	}
	err = session.repeated(func(ctx context.Context) error {
		created, err := session.client.CreateSession(ctx, request)
		if err != nil {
			return err
		}
		session.id, session.size = created.Session.SessionId, created.Session.Layout.Size
		session.token, session.epoch = created.AttachToken, created.Session.Epoch
		return nil
	})
	if err == nil {
		err = session.repeated(func(ctx context.Context) error { return session.upload(ctx, parameters) })
	}
	return session, err
}

// Step applies the next step, exactly once, and returns the new parameters.
func (session *Session) Step(gradient []float32) ([]float32, error) {
	number := session.appliedStep + 1
	var parameters []float32
	err := session.repeated(func(ctx context.Context) error {
		applied := session.appliedStep
		if session.stream == nil {
			var err error
			if applied, err = session.attach(); err != nil {
				return err
			}
		}
		// The deadline of a step ends the stream, which is longer than any step.
		timer := time.AfterFunc(session.timeout, session.leave)
		defer timer.Stop()
		if applied >= number {
			gradient = nil // it was applied, and its reply was lost: asked for without the gradient
		}
		var err error
		if err = session.send(number, gradient); err == nil {
			parameters, err = session.receive()
		}
		if err != nil {
			session.drop()
		}
		return err
	})
	if err == nil {
		session.appliedStep = number
	}
	return parameters, err
}

// Close ends the session and the connection.
func (session *Session) Close() error {
	session.drop()
	ctx, cancel := context.WithTimeout(context.Background(), session.timeout)
	defer cancel()
	request := &pb.DeleteSessionRequest{SessionId: session.id, AttachToken: session.token}
	if _, err := session.client.DeleteSession(ctx, request); err != nil {
		return err
	}
	return session.connection.Close()
}

// attach opens a stream and returns the number of the last applied step.
func (session *Session) attach() (uint64, error) {
	ctx, cancel := context.WithCancel(context.Background())
	timer := time.AfterFunc(session.timeout, cancel)
	defer timer.Stop()
	stream, err := session.client.Attach(ctx)
	if err != nil {
		cancel()
		return 0, err
	}
	session.stream, session.leave = stream, cancel
	open := &pb.AttachOpen{SessionId: session.id, AttachToken: session.token, Epoch: session.epoch}
	if err = session.write(&pb.AttachRequest{Open: open}); err == nil {
		var reply *pb.AttachResponse
		if reply, err = stream.Recv(); err == nil {
			session.token = reply.Opened.AttachToken
			session.Attached++
			return reply.Opened.AppliedStep, nil
		}
	}
	session.drop()
	return 0, err
}

// send sends the messages of a step; without a gradient it asks for the reply of a step that was applied.
func (session *Session) send(number uint64, gradient []float32) error {
	message := &pb.AttachRequest{Begin: &pb.StepBegin{
		Step: number, Epoch: session.epoch, Load: &session.load,
		Reply: &pb.ReplyOptions{ChunkBytes: uint64(float32Bytes * session.chunkElements)},
	}}
	for start := 0; start < len(gradient); start += session.chunkElements {
		end := start + session.chunkElements
		if end < len(gradient) {
			message.Chunk, message.Payload = chunkOf(gradient, start, end)
			if err := session.write(message); err != nil {
				return err
			}
			message = &pb.AttachRequest{}
			continue
		}
		message.Chunk, message.Payload = chunkOf(gradient, start, len(gradient))
	}
	if session.CutBefore == number {
		session.CutBefore = 0
		session.leave()
	}
	message.Commit = &pb.StepCommit{}
	if err := session.write(message); err != nil {
		return err
	}
	if session.CutAfter == number {
		session.CutAfter = 0
		_, err := session.stream.Recv() // the step is applied: its reply has begun
		session.leave()
		return err
	}
	return nil
}

// receive reads the chunks of a reply up to its result.
func (session *Session) receive() ([]float32, error) {
	parameters := make([]float32, session.size)
	for {
		message, err := session.stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil, status.Error(codes.Unavailable, "the server ended the stream")
		}
		if err != nil {
			return nil, err
		}
		if message.Chunk != nil {
			decode(message.Payload, parameters[message.Chunk.Offset:])
		}
		if message.Result != nil {
			if message.Result.Replayed {
				session.Replayed++
			}
			return parameters, nil
		}
	}
}

// write sends a message. Send says EOF for a stream that has ended, and Recv has the status.
func (session *Session) write(message *pb.AttachRequest) error {
	err := session.stream.Send(message)
	if !errors.Is(err, io.EOF) {
		return err
	}
	for {
		if _, err = session.stream.Recv(); err != nil {
			return err
		}
	}
}

func (session *Session) drop() {
	if session.stream != nil {
		session.leave()
		session.stream = nil
	}
}

// upload loads parameters: load number 1, of the slot "param".
func (session *Session) upload(ctx context.Context, parameters []float32) error {
	call, err := session.client.Load(ctx)
	if err != nil {
		return err
	}
	open := &pb.LoadOpen{
		SessionId: session.id, AttachToken: session.token, Epoch: session.epoch, Load: 1, Slots: []string{"param"},
	}
	messages := []*pb.LoadRequest{{Open: open}}
	for start := 0; start < len(parameters); start += session.chunkElements {
		end := start + session.chunkElements
		if end > len(parameters) {
			end = len(parameters)
		}
		chunk, payload := chunkOf(parameters, start, end)
		messages = append(messages, &pb.LoadRequest{Slot: "param", Chunk: chunk, Payload: payload})
	}
	messages = append(messages, &pb.LoadRequest{Commit: true})
	for _, message := range messages {
		if call.Send(message) != nil {
			break // CloseAndRecv has the status
		}
	}
	if _, err = call.CloseAndRecv(); err == nil {
		session.load = 1
	}
	return err
}

// repeated makes a call, and again after a random fraction of a growing pause, until the time is over.
func (session *Session) repeated(call func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), session.timeout)
	defer cancel()
	for pause := firstPause; ; pause *= 2 {
		err := call(ctx)
		code := status.Code(err)
		if err == nil || (code != codes.Unavailable && code != codes.Canceled) || ctx.Err() != nil {
			return err
		}
		if pause > longestPause {
			pause = longestPause
		}
		time.Sleep(time.Duration(mathrand.Int63n(int64(pause))))
	}
}

// reasonOf returns the reason of an error, which programs compare; empty for an error that is gRPC's own.
func reasonOf(err error) string {
	for _, detail := range status.Convert(err).Proto().GetDetails() {
		// The contract repeats google.rpc's messages, byte for byte, so no further package is needed.
		if info := new(pb.ErrorInfo); strings.HasSuffix(detail.TypeUrl, "/google.rpc.ErrorInfo") &&
			proto.Unmarshal(detail.Value, info) == nil {
			return info.Reason
		}
	}
	return ""
}

func chunkOf(values []float32, start, end int) (*pb.Chunk, []byte) {
	payload := make([]byte, float32Bytes*(end-start))
	for i, value := range values[start:end] {
		binary.LittleEndian.PutUint32(payload[float32Bytes*i:], math.Float32bits(value))
	}
	return &pb.Chunk{Offset: uint64(start), Count: uint64(end - start)}, payload
}

func decode(payload []byte, values []float32) {
	for i := range values[:len(payload)/float32Bytes] {
		values[i] = math.Float32frombits(binary.LittleEndian.Uint32(payload[float32Bytes*i:]))
	}
}

func randomID() string {
	bytes := make([]byte, 16)
	if _, err := rand.Read(bytes); err != nil {
		panic(err)
	}
	return hex.EncodeToString(bytes)
}
